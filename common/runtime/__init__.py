"""What any program needs: errors, files, processes, devices, images."""
