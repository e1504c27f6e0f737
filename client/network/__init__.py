"""The hospital's end of the network: its keys, its kit, and the SuperNode that it runs."""
