"""What each command of `dl2pa` does, a module a command with `run(args) -> exit code`."""
