"""One machine's stack: Triton, Redis and the gateway as child processes of one supervisor.

tritonserver finds and prepares the server, places says where each one is, process starts and ends children, healing
decides what a failing model needs, servers has all that belongs to one server, supervisor runs the whole, alias names
paths that they cannot take, state tells other commands where it is.
"""
