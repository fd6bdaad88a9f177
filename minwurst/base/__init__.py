"""What every floor may use: errors, settings, the console. Nothing here imports torch."""
