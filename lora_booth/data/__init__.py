"""The user's pictures: finding, cropping, caching, and the order in which training sees them."""
