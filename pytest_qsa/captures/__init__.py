"""What a pass leaves: statistics, the numbers of each site, the capture and its file, merging, the cache. numpy only."""
