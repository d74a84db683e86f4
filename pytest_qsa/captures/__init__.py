"""What a pass leaves: statistics, numbers of each site, the capture and its file, merging, the cache. numpy only."""
