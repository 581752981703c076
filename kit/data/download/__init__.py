"""The official files of GLDv2, and the images of its first generation, from their servers."""
