"""What a consortium's coordinator and its hospitals tell each other before any run: keys, requests, kits."""
