"""The engine: requests in, results out; sequences, steps and everything that touches the device for them."""
