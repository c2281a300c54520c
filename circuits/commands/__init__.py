"""One file a command: `configure(parser)` names its arguments, `run(arguments)` does it.

Files here import what is heavy only inside `run`.
"""
