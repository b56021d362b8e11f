"""Real clients: what a server and a site need beside the program, and how a run is handed to Flower."""
