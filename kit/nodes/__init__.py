"""What a launch is made of below kit.launch, on one node or several."""
