"""The guard's contract over a Unix socket: frames, the courier's end (`remote`), the guard's (`service`)."""
