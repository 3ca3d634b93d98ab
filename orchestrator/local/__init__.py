"""One machine's stack: Triton, Redis and the gateway as child processes of one supervisor.

tritonserver finds and prepares the server, process starts and ends children, healing decides what a failing model
needs,
supervisor runs it all, alias names paths that they cannot take, state tells other commands where it is.
"""
