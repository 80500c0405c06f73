"""Renting machines for MOMA Lisa: RunPod, GKE, and the image. Nothing here is imported by the library or the jobs."""
