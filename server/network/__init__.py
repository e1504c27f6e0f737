"""The coordinator's network: its authority, its members, and the two processes that hospitals reach."""
