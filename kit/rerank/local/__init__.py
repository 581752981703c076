"""Local verification of a shortlist: keypoints, matches, and the inliers of one geometry.

Nothing under a restrictive licence: SIFT of OpenCV, and as extras XFeat, ALIKED and LightGlue.
"""
