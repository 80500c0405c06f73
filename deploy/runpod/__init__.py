"""RunPod: a client of its REST API v2 and a Ray node provider over it."""
