"""Plans and forecasts: how many sequences fit in memory, and how long a run takes. Touches no tensor."""
