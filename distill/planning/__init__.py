"""What a recipe will cost: a short measurement on the spot, scaled to any number of images before anybody pays."""
