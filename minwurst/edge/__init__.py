"""Where a run touches the world: data sets, model folders, caches, images, the Hub."""
