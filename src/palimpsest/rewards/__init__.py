"""Learned reward functions: does what was learned from comparisons hold for a learner that starts afresh?"""
