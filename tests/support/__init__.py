"""What tests share: oracles, models and corpora made by code, real servers and machines, and what looks at them."""
