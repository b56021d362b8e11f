"""People's comparisons: reading them, sharing them out to clients, and turning them into tokens."""
