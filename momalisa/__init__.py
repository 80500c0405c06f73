"""MOMA Lisa's library: from a museum's pictures to a generator of new art. It never imports ray."""

__version__ = "0.1.0"
