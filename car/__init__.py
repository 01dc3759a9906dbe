"""CarRacing: environments, renderer, telemetry. This file holds constants and imports nothing."""

ENV_ID = "CarRacing-v3"
OBS_SIZE = 64  # px
PREPROCESS_VERSION = 2  # goes up whenever the same world would look different
MAX_STEPS = 1000  # per episode, as registered for ENV_ID
FPS = 50  # steps a second
ZOOM_STEPS = 50  # the camera zooms in over the first second; training and driving skip these frames
SCENE_H = 56  # rows of the 64-pixel frame above the HUD
