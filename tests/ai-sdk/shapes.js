// What is asked for by schema. All of it has an end: a small model may go on for ever with a text or with white space.

import { z } from "zod";

export const QUESTION = "What is the weather in Paris?";

// `x-guidance` at the top of a schema: no white space between the parts of the JSON.
export const COMPACT = { "x-guidance": { whitespace_flexible: false } };

export const Weather = z
  .object({
    city: z.string().max(12),
    degrees: z.number().int().min(-60).max(60),
    sky: z.enum(["clear", "cloudy"]),
  })
  .meta(COMPACT);

export const City = z.object({ city: z.enum(["Paris", "Rome"]) });

export const Song = z.object({ loud: z.boolean() });
