"""What a manifest is made of."""
