"""What a pass leaves: the statistics, the numbers of each site, the capture and its file, merging, the cache. numpy only."""
