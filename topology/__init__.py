"""What hardware there is: devices, links and how they are found. Imports nothing of flexpiped's other packages."""
