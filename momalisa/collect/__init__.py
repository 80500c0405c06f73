"""From a museum to clean pictures: sources list works, the downloader fetches, hygiene judges and cleans."""
