// The shapes that the server answers with: names for what openapi.d.ts (generated, `tools/web.sh types`) holds.
import type { components } from './openapi'

type Schemas = components['schemas']
export type Session = Schemas['Session']
export type Role = NonNullable<Session['role']>
export type Person = Schemas['SessionUser']
export type Measure = Schemas['MeasureShown']
export type Study = Schemas['StudyShown']
export type StudyChange = Schemas['StudyChange']
export type Item = Schemas['Item']
export type ImageList = Schemas['ImageList']
export type ImageDetail = Schemas['ImageDetail']
export type ScoreEvent = Schemas['EventShown']
export type Job = Schemas['JobShown']
export type JobState = Job['state']
export type UploadAnswer = Schemas['UploadAnswer']
export type Account = Schemas['PersonShown']
export type EventBody = Schemas['EditAsked']
export type ActiveImage = Schemas['ActiveImage']
/** Scores by the key of their measure; null where one was taken back. */
export type Scores = Record<string, number | null>

// The agreement's answer is free JSON in the OpenAPI; this is its form.
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
