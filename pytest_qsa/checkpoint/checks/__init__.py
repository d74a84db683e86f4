"""The static checks, by what they look at: keys, settings, scales, packed weights."""
