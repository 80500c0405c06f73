"""What to do when a path or a bucket cannot be read: the address, the reason, and the way out."""

from __future__ import annotations

ROLE = "roles/storage.objectViewer"
DENIED = ("forbidden", "anonymous caller", "unauthorized", "does not have storage.", "permission", ", 401", ", 403")
NO_CREDENTIALS = ("anonymous caller", "credentials", "unauthorized", ", 401")


def unreadable(location: str, error: Exception) -> ValueError:
    """A storage's own error as one that names the location and says what would help."""
    said = " ".join(str(error).split())[:300]
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{location} cannot be read: no such file or folder; check collect.source.location")
    if location.startswith(("gs://", "gcs://")):
        return ValueError(f"{location} cannot be read: {type(error).__name__}: {said}; {_way_out(location, said.lower())}")
    return ValueError(f"{location} cannot be read: {type(error).__name__}: {said}; check collect.source.location")


def _way_out(location: str, said: str) -> str:
    bucket = location.split("://", 1)[1].split("/", 1)[0]
    if any(sign in said for sign in NO_CREDENTIALS):
        return (
            f"there are no credentials for it: set GOOGLE_APPLICATION_CREDENTIALS to the path of a service account's key (or run "
            f"`gcloud auth application-default login`), and grant that account {ROLE} on gs://{bucket}"
        )
    if any(sign in said for sign in DENIED):
        return f"grant the account that this runs as (see GOOGLE_APPLICATION_CREDENTIALS) {ROLE} on gs://{bucket}"
    return f"check the bucket's name in collect.source.location, and that this machine reaches it (gs://{bucket})"
