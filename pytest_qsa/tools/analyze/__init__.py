"""What `qsa analyze` does with a configuration: pictures and exports of one capture. Nothing here judges."""
