"""The vocabulary that the server and the hospitals share; it imports neither side."""
