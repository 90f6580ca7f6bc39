"""The one engine that owns the weights: it trains and it generates."""
