"""Many workers for one job: each answers rows with a model of its own, on this machine or on a Ray cluster."""
