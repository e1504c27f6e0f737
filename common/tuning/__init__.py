"""How a frozen network is tuned: presets by name, where they sit in it, and slots to write adapters into."""
