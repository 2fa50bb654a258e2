"""The model: loading it, what it looks like from outside, its texts and its rotary embedding."""
