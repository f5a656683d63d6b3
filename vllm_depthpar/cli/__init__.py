"""One module per subcommand of `depthpar`: its arguments, and what it prints.

A module's `add(commands)` registers the subcommand, with `run`: arguments in, text out. What is
slow to import is imported inside `run`.
"""
