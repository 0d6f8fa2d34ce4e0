"""The SpatialScore server, as a binary: `spatialscore serve`. Its client is the package spatialscore-client."""
