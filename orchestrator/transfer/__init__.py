"""Bulk data between here and a node: fingerprints, upload, download, code archives."""
