"""GLDv2 and other sets -> image lists, pixels and the order in which training meets them."""
