"""The ground that every script stands on; it imports nothing of the project above it."""
