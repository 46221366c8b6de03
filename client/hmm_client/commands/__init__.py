"""The commands of `hmmctl`, one module each, loaded when they are used.

`connection` connects and turns errors into messages and exit codes, `output` prints tables and JSON, `progress` shows
how far a long command has come.

Exit codes of all commands: 0 it is as it should be; 1 it is not (differences, violations, unhealthy, expectations
that were not met); 2 the input or the command line is not usable; 3 no daemon can be reached; 4 the daemon refused;
130 Ctrl-C.
"""
