"""The command line: one file a command; nothing outside this folder imports click."""
