"""Real machines: the folder that a server lives in, its keys, and the processes of Flower that serve a federation."""
