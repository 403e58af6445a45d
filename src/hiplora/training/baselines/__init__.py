"""One file a method: its settings, how its adapter is made, and what it does while it trains."""
