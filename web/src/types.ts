// The shapes that the server answers with, as the page uses them.
export type Role = 'viewer' | 'scorer' | 'admin'
export type JobState = 'Pending' | 'Processing' | 'Completed' | 'Failed'
export type Scores = Record<string, number | null>

export interface Person { id: number; name: string }
export interface Session {
  user: Person | null
  role: Role | null
  single: boolean
  setup_needed: boolean
  study: string
  study_id?: string
}
export interface Measure { key: string; name: string; low: number; high: number; step: number }
export interface ModelInfo { version: string; metrics: Record<string, unknown> | null }
export interface Study {
  name: string
  measures: Measure[]
  blind_first: boolean
  serial_pattern: string
  serial_form: string
  consensus: string
  held_out: number
  model: ModelInfo | null
  counts: Record<string, number>
  groups: string[]
  scorers: Person[]
}
export interface Item {
  id: number
  name: string
  serial: string | null
  group: string | null
  width: number | null
  height: number | null
  um_per_px: number | null
  status: JobState | null
  reason: string | null
  changed: boolean
  flagged: boolean
  matched: boolean
  created_at: string
  sha256?: string | null
  draft: Scores | null
  draft_hidden: boolean
  model_version: string | null
  mine: Scores
  others: number
  consensus: Scores | null
  far: number | null
}
export interface ScoreEvent {
  id: number
  uid: string
  measure: string | null
  value: number | null
  kind: 'score' | 'draft' | 'consensus' | 'undo' | 'flag'
  user: string | null
  model_version: string | null
  draft_visible: boolean | null
  seconds: number | null
  at: string
}
export interface ImageDetail extends Item {
  events: ScoreEvent[]
  people: { id: number; name: string; scores: Scores }[]
}
export interface Job {
  id: number
  image_id: number
  name: string
  state: JobState
  reason: string | null
  attempts: number
  created_at: string
  finished_at: string | null
  model_version: string | null
}
export interface UploadAnswer {
  accepted: { name: string; id: number; known: boolean; changed: boolean; job: number | null }[]
  refused: { name: string; why: string }[]
}
export interface Account { id: number; name: string; role: Role; active: boolean; created_at: string }
export interface Interval { value: number | null; low: number | null; high: number | null }
export interface MeasureAgreement { kappa: Interval; icc: Interval; alpha: Interval; ac2: Interval; n: number }
export interface Confusion { levels: number[]; people: number[][]; model: number[][] | null }
export interface Agreement {
  raters: string[]
  measures: Record<string, MeasureAgreement>
  pairs: { a: string; b: string; measure: string; kappa: Interval; b_minus_a: number; n: number }[]
  confusion: Record<string, Confusion>
  most_split: { image: number; measure: string; spread: number; low: number; high: number }[]
  pull: { blind: Interval; seen: Interval; pull: Interval; n_blind: number; n_seen: number } | null
}
