"""Models: where they come from, how they are loaded, what they need, how adapters are merged into them."""
