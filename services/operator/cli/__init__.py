"""The command line: arguments, numbers as people type them, output and tables."""
